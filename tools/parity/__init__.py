"""Parts of tools/check_parity.py: does this project compute what the original stored?"""
