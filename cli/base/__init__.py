"""What every command uses: argument types, help, addresses and lines on the terminal."""
