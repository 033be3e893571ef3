"""One graph of a whole model, from pixels to logits, checked against the model that runs.

`trace` makes the graph with torch.fx, `functionalize` removes in-place writes from it,
`faithfulness` compares it with the model operation by operation, `graph` holds the result.
An operation that needs no rule, because it only reads shapes, goes into `nodes`. Keywords of
torch's that rules take by position or by another name go into `functionalize`.
"""
