"""Other engines that run this project's drafters, each in a room of its own.

What an engine needs of us stands here: vLLM's plug-in, and what each engine can run. An engine's
package is imported only by its own room, and only where that engine has loaded it.
"""
