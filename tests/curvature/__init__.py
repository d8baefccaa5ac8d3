"""Tests of curvature."""
