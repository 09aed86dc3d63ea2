"""The page that shows what an export cost and what it kept: one HTML file without any other."""

from qvdit.report.html import ReportVideo, write_html

__all__ = ["ReportVideo", "write_html"]
