"""The accuracy study: what converting costs in accuracy, and what healing brings back.

python -m benchmarks.accuracy --data FOLDER     every cell that is not recorded yet
"""
