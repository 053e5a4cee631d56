from ._agent import AbstractAgent as AbstractAgent, BehaviourFlow as BehaviourFlow
from ._behaviour_cloning import BehaviourCloning as BehaviourCloning
from ._fine_tune import fine_tune as fine_tune
from ._fisher_decorator import FisherDecorator as FisherDecorator
from ._flow_q_learning import FlowQLearning as FlowQLearning
from ._implicit_q_learning import ImplicitQLearning as ImplicitQLearning
from ._log import TensorBoard as TensorBoard, WeightsAndBiases as WeightsAndBiases
from ._normalised_policy import NormalisedPolicy as NormalisedPolicy
from ._one_step import OneStep as OneStep
from ._published import (
    published_settings as published_settings,
    PublishedSettings as PublishedSettings,
)
from ._train import train as train, Trained as Trained
