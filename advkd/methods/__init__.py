"""Distillation methods: one paper a module."""
