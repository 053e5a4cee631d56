from ._agent import AbstractAgent as AbstractAgent
from ._behaviour_cloning import BehaviourCloning as BehaviourCloning
from ._behaviour_flow import BehaviourFlow as BehaviourFlow
from ._fisher_decorator import FisherDecorator as FisherDecorator
from ._flow_q_learning import FlowQLearning as FlowQLearning
from ._implicit_q_learning import ImplicitQLearning as ImplicitQLearning
from ._normalised_policy import NormalisedPolicy as NormalisedPolicy
from ._one_step import OneStep as OneStep
from ._published_settings import (
    published_settings as published_settings,
    PublishedSettings as PublishedSettings,
)
