"""Checks of prompts and pictures, watermarks, and the audit log. Nothing else in the library imports them by itself."""
