"""The loops, the stage runner, the recipes and the command line.

Importing it sets the environment variables that Ray reads only once, when it is imported; those already set stay.
"""

from treadle.cluster.environment import prepare_environment

prepare_environment()
