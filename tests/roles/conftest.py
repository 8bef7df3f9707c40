"""Puts plugins/module_utils where Ansible puts it, before any test imports from there."""

import role_modules  # noqa: F401
