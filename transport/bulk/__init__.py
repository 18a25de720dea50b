"""Bulk connections: the payload of links between hosts, beside the control messages, received in place."""
