"""The verbs of training as a service, whoever executes them: a server over HTTP, or this process in local mode.

`twinkle_client.ServiceClient` and `twinkle.ServiceClient` are these classes over two channels.
"""
