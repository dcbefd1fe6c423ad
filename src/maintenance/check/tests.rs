//! Damage of every kind, planted one at a time in a small volume: found under its code, with its
//! place, and nothing else.

mod contradictions;
mod crashes;
mod damage;
mod expected;
mod forge;
mod keyless;
mod repair;
mod states;
pub(crate) mod support;
