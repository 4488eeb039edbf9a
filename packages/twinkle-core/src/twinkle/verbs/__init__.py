"""The verbs of training as a service, executed by a server over HTTP, or in this process in local mode.

`twinkle_client.ServiceClient` and `twinkle.ServiceClient` are these classes over two channels.
"""
