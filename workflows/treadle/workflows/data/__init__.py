"""Where prompts, supervised pairs and token streams come from: generators, and files by URL.

Everything is addressed by an index and computed from it: the cursor in a checkpoint is a number, and the same
number gives the same data in every process.
"""
