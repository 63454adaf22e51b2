"""A run -> what others open: Hugging Face's folder, llama.cpp's file, its card."""
