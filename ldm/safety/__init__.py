"""Checks of prompts and pictures, watermarks, and the audit log."""
