//! `vault show`, `vault update`, `vault network-rule`: what holds for the whole vault.

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use ureq::http::Method;

use super::client::Client;
use super::{Target, unexpected};
use crate::cli::output;
use crate::error::{Error, Kind, Result};
use crate::vault::{Cidr, VaultDir};

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    #[command(flatten)]
    target: Target,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Action {
    Allow,
    Deny,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Switch {
    Enabled,
    Disabled,
}

#[derive(Debug, Args)]
pub(super) struct UpdateArgs {
    /// Permissions by role assignments instead of access policies
    #[arg(long, value_name = "true|false", action = clap::ArgAction::Set)]
    enable_rbac_authorization: Option<bool>,
    /// Whether the keys can be reached over the network at all
    #[arg(long, value_enum, ignore_case = true)]
    public_network_access: Option<Switch>,
    /// What holds for addresses that no network rule names
    #[arg(long, value_enum, ignore_case = true)]
    default_action: Option<Action>,
    /// Move the vault to this tenant; identities of others get nowhere
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(super) struct RuleArgs {
    #[command(subcommand)]
    verb: RuleVerb,
}

#[derive(Debug, Subcommand)]
enum RuleVerb {
    /// Let an address or range reach the keys
    Add(ChangeArgs),
    /// Take that back
    Remove(ChangeArgs),
    /// Show the network rules
    List(ShowArgs),
}

#[derive(Debug, Args)]
struct ChangeArgs {
    /// As 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32
    #[arg(long)]
    ip_address: Cidr,
    #[command(flatten)]
    target: Target,
}

pub(super) fn show(args: ShowArgs) -> Result<()> {
    let vault = connect(&args.target)?.administer(Method::GET, "/vault", None)?;
    print(args.target.json, &vault)
}

pub(super) fn update(args: UpdateArgs) -> Result<()> {
    let mut body = json!({});
    if let Some(roles) = args.enable_rbac_authorization {
        body["enableRbacAuthorization"] = json!(roles);
    }
    if let Some(switch) = args.public_network_access {
        body["publicNetworkAccess"] = json!(match switch {
            Switch::Enabled => "Enabled",
            Switch::Disabled => "Disabled",
        });
    }
    if let Some(action) = args.default_action {
        body["networkAcls"] = json!({ "defaultAction": match action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
        } });
    }
    if let Some(tenant) = args.tenant {
        body["tenantId"] = json!(tenant);
    }
    if body == json!({}) {
        return Err(Error::usage(
            "nothing to set: pass --enable-rbac-authorization, --public-network-access, \
             --default-action or --tenant",
        ));
    }
    let vault = connect(&args.target)?.administer(Method::PATCH, "/vault", Some(&body))?;
    print(args.target.json, &vault)
}

pub(super) fn rule(args: RuleArgs) -> Result<()> {
    match args.verb {
        RuleVerb::List(args) => {
            let vault = connect(&args.target)?.administer(Method::GET, "/vault", None)?;
            print(args.target.json, &vault)
        }
        RuleVerb::Add(args) => change(args, true),
        RuleVerb::Remove(args) => change(args, false),
    }
}

fn change(args: ChangeArgs, add: bool) -> Result<()> {
    let client = connect(&args.target)?;
    let vault = client.administer(Method::GET, "/vault", None)?;
    let wanted = args.ip_address.to_string();
    let there = vault["networkAcls"]["ipRules"].as_array();
    let there = there.ok_or_else(|| unexpected("networkAcls"))?;
    let mut rules: Vec<Value> =
        there.iter().filter(|rule| rule["value"] != wanted.as_str()).cloned().collect();
    if add {
        rules.push(json!({ "value": wanted }));
    } else if rules.len() == there.len() {
        return Err(Error::new(Kind::Denied, format!("there is no network rule {wanted}")));
    }
    let body = json!({ "networkAcls": { "ipRules": rules } });
    let vault = client.administer(Method::PATCH, "/vault", Some(&body))?;
    print(args.target.json, &vault)
}

fn print(as_json: bool, vault: &Value) -> Result<()> {
    if as_json {
        return output::json(vault);
    }
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let rules: Vec<String> = vault["networkAcls"]["ipRules"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|rule| text(&rule["value"]))
        .collect();
    let roles = vault["enableRbacAuthorization"] == true;
    let protected = vault["enablePurgeProtection"] == true;
    output::text(&format!(
        "name           {}\nflavor         {}\nregion         {}\ntenant         {}\n\
         permissions    {}\nretention      {} days, purge protection {}\n\
         public access  {}\nother networks {}\nallowed        {}\n",
        text(&vault["name"]),
        text(&vault["flavor"]),
        text(&vault["location"]),
        text(&vault["tenantId"]),
        if roles { "role assignments" } else { "access policies" },
        vault["softDeleteRetentionInDays"],
        if protected { "on" } else { "off" },
        text(&vault["publicNetworkAccess"]),
        text(&vault["networkAcls"]["defaultAction"]),
        if rules.is_empty() { "-".to_owned() } else { rules.join(",") },
    ))
}

fn connect(target: &Target) -> Result<Client> {
    Client::connect(VaultDir::new(&target.vault))
}
