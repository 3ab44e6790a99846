_base_ = ['./_base_/detection-before-nms.py', './_base_/tensorrt.py']
