"""Optional leaves for those who run the library for others. Nothing else in the library imports them by itself."""
