"""Pages from Jinja2 templates, which lie in the folder `templates` of the package that fills them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastcnn.system.text import printable


def render(
    packages: Sequence[str], name: str, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any
) -> str:
    """Return a template filled with values.

    In HTML every value is escaped. Text is made printable first: names of classes and files are whatever their owner
    called them. A name that the template uses and nobody gives is an error.

    Args:
        packages: those whose templates may be used, the first with a template of that name wins.
        name: file name of the template.
        filters: functions that the template may apply to values.
        values: variables of the template.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in packages]),
        autoescape=jinja2.select_autoescape(["html"], default=False),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name).render(**values)
