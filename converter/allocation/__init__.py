"""Bit allocation: how many binary planes each input group gets."""
