from ._evaluate import evaluate as evaluate
