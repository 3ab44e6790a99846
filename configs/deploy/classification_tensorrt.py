_base_ = ['./_base_/classification.py', './_base_/tensorrt.py']
