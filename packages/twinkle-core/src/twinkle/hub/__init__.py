"""Finding models and datasets: `resolve` turns an id into a local folder; `plain_name` is its name in other programs.

`places` has ids, places and their order; `downloads` talks to the two public hubs. Callers read the folder's files.
"""

from twinkle.hub.downloads import Kind
from twinkle.hub.places import plain_name, resolve

__all__ = ["Kind", "plain_name", "resolve"]
