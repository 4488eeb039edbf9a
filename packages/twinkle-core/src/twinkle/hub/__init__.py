"""Where models and datasets come from: `resolve` turns an id into a folder on this machine; `plain_name` is what other
programs call it.

Ids, places and their order are in `places`; talking to the two public hubs is in `downloads`. What is in the
folder is read by whoever asked for it.
"""

from twinkle.hub.downloads import Kind
from twinkle.hub.places import plain_name, resolve

__all__ = ["Kind", "plain_name", "resolve"]
