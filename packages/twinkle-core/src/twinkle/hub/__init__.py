"""Where models and datasets come from: `resolve` turns an id into a folder on this machine.

Ids, places and their order are in `places`; talking to the two public hubs is in `clients`. What is in the
folder is read by whoever asked for it.
"""

from twinkle.hub.clients import Kind
from twinkle.hub.places import resolve

__all__ = ["Kind", "resolve"]
