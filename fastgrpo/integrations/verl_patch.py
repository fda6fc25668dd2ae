"""Importing this module is :func:`fastgrpo.integrations.verl.apply`, for settings that name a module to import."""

from fastgrpo.integrations.verl import apply

apply()
