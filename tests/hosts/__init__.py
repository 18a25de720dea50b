"""Tests over two hosts: network namespaces with a /dev/shm each."""
