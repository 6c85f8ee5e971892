"""Who may do what: certificates, and later people and their roles."""


class AccessError(Exception):
    """What can't be done with certificates or users; the message begins with the file or the option."""
