"""From hidden states to log-probabilities, losses and each row's result.

formulas                     what each loss reads, checks of rows, and closed forms in numpy
functions                    the losses in torch
custom_check, custom_eval    a client's own loss: checked against an allow-list; evaluated node by node
logprobs, row_losses         what comes before and after a loss
"""
