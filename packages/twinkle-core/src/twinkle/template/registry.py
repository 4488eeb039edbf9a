"""Template classes by name, for `Dataset.set_template("Template", ...)` and configuration files."""

from twinkle.protocol.errors import InvalidRequest
from twinkle.template.template import Template

_CLASSES: dict[str, type[Template]] = {"Template": Template}


def register_template(name: str, template_class: type[Template]) -> None:
    _CLASSES[name] = template_class


def get_template_class(name: str) -> type[Template]:
    """The class of that name.

    Raises:
        InvalidRequest: if there is none.
    """
    if name not in _CLASSES:
        raise InvalidRequest(f"template: {name!r} is unknown; known are {', '.join(sorted(_CLASSES))}")
    return _CLASSES[name]
