"""Launchers: configs to work directories, work directories to tables and figures."""
