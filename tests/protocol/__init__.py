"""The record protocol, explored exhaustively as a small model."""
