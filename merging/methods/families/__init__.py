"""Families of merge methods: every module here that has METHODS adds its entries to the table."""
