"""PPO of Tianshou with action masks, on single environments.

pip install -e '.[train]' tianshou; python examples/tianshou_ppo.py
"""
