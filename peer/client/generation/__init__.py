"""From a prompt to text: chat, sampling and streams of tokens."""
