"""The tests: real processes, sockets and segments; see conftest.py for what every test must leave behind."""
