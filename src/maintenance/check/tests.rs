//! Damage of every kind, planted one at a time in a small volume: found under its code, with its
//! place, and nothing else.

mod damage;
mod keyless;
mod repair;
mod states;
pub(crate) mod support;
