"""How a feature travels, inside the engine: docs/how-it-works.md follows one image through it.

`tokenizer_side` is the whole way of a request that is sent, `scheduler_side` that of one that is received. Between
them travels a `pointer`, with a payload of one of the transports in `chain`. Beside that way, `sharing` is for the
samples of a request, `gate` and `controller_side` for other nodes, `processing` and `pipeline` for what ranks send
each other.
"""
