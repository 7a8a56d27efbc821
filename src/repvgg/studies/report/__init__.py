"""Report pages: ``report.json`` and ``report.html`` of the quickstart, and the page and charts of a study.

:mod:`.schema` defines the content of ``report.json``, :mod:`.render` fills the Jinja2 templates, :mod:`.charts` and
:mod:`.page_charts` draw with Matplotlib.
"""
