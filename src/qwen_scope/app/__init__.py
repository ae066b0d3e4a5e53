"""The web app: what the library computes, in a browser.

`build.create` builds the page, and `serve.running` serves it while a block runs. Nothing here computes features,
texts or figures: each tab calls the library and shows what comes back. Nothing of one visitor is kept where another one's
requests could meet it: results live in the visitor's session, and what a link restores lives in the link.
"""
