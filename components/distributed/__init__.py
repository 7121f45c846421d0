"""Modules spread over ranks, and what ranks do together."""
