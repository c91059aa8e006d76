"""The demo: a Gradio app that runs on your machine, and as a Space."""
