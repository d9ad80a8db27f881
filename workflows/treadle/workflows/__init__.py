"""The loops, the stage runner, the recipes and the command line."""
