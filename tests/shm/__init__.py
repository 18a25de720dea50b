"""Tests of the shm package."""
