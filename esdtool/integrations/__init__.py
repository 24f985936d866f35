"""Thin adapters that put weight decays into other trainers. Each imports its library; nothing imports them."""
