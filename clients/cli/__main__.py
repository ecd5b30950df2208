"""`python -m clients.cli`"""

from clients.cli.app import main

if __name__ == "__main__":
    main()
