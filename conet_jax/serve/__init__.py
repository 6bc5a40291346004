"""What a trained model is for: lists, reasons, files for other programs."""
