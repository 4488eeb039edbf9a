"""The wire: the only definition of what client and server say to each other.

`types` are the values, `messages` the requests and replies, `endpoints` where each is sent, `codec` how each is
encoded, `uris` the names of checkpoints, `errors` what can go wrong. The protocol is Tinker's, with additions.
"""
