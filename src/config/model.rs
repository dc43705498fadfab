//! Section `[model]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{MOST_WIDTH, check_count, check_finite, check_width};

/// Largest number of layers of a body.
const MAX_LAYERS: i64 = 1000;

/// Section `[model]`: which model; `kind` is required.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum ModelConfig {
    /// GRU over the session (Hidasi et al. 2016).
    Gru(GruConfig),
    /// Attention over the session with relative positions (Yang et al. 2019).
    Xlnet(XlnetConfig),
    /// Baseline: the most frequent items of all days so far.
    Popularity {},
    /// Baseline: the most frequent items of the last day, then of all days so far.
    Recent {},
    /// Baseline: the items that followed the last item most often, then popularity.
    Markov {},
    /// Baseline: V-SkNN, the items of similar sessions, then popularity (Ludewig and Jannach 2018).
    Vsknn(NeighboursConfig),
    /// Baseline: a log-linear model of co-occurrence counts, then popularity.
    Loglinear(LogLinearConfig),
}

impl ModelConfig {
    /// Checks the ranges of the values, for sessions of at most `max_length` events.
    ///
    /// # Errors
    /// Returns the first invalid key.
    pub fn check(&self, max_length: usize) -> Result<(), String> {
        match self {
            ModelConfig::Vsknn(neighbours) => neighbours.check(),
            ModelConfig::Loglinear(loglinear) => loglinear.check(),
            ModelConfig::Xlnet(xlnet) => {
                xlnet.check_length(max_length).and_then(|()| Neural::Xlnet(xlnet).check())
            }
            _ => self.neural().map_or(Ok(()), Neural::check),
        }
    }

    /// `None` for a baseline.
    pub fn neural(&self) -> Option<Neural<'_>> {
        match self {
            ModelConfig::Gru(gru) => Some(Neural::Gru(gru)),
            ModelConfig::Xlnet(xlnet) => Some(Neural::Xlnet(xlnet)),
            ModelConfig::Popularity {}
            | ModelConfig::Recent {}
            | ModelConfig::Markov {}
            | ModelConfig::Vsknn(_)
            | ModelConfig::Loglinear(_) => None,
        }
    }

    /// The candidates that counts are looked up for, if any.
    pub fn candidates(&self) -> Option<&CandidatesConfig> {
        match self {
            ModelConfig::Loglinear(loglinear) => Some(&loglinear.candidates),
            _ => {
                let evidence = self.neural().and_then(|model| model.head().evidence.as_ref());
                evidence.map(|evidence| &evidence.candidates)
            }
        }
    }

    /// Name for people, with the objective if it is not the model's usual one.
    pub fn title(&self) -> String {
        match self {
            ModelConfig::Gru(gru) => match gru.objective {
                // The usual objective of a GRU.
                Objective::Causal { .. } => "GRU".to_owned(),
                _ => format!("GRU-{}", gru.objective.short_name()),
            },
            ModelConfig::Xlnet(xlnet) => format!("XLNet-{}", xlnet.objective.short_name()),
            ModelConfig::Popularity {} => "Popularity".to_owned(),
            ModelConfig::Recent {} => "Popularity of the last day".to_owned(),
            ModelConfig::Markov {} => "Markov".to_owned(),
            ModelConfig::Vsknn(_) => "V-SkNN".to_owned(),
            ModelConfig::Loglinear(_) => "Log-linear counts".to_owned(),
        }
    }
}

/// The configuration of a model that is trained by gradient descent.
#[derive(Clone, Copy, Debug)]
pub enum Neural<'a> {
    Gru(&'a GruConfig),
    Xlnet(&'a XlnetConfig),
}

impl<'a> Neural<'a> {
    pub fn input(self) -> &'a InputConfig {
        match self {
            Neural::Gru(gru) => &gru.input,
            Neural::Xlnet(xlnet) => &xlnet.input,
        }
    }

    pub fn objective(self) -> &'a Objective {
        match self {
            Neural::Gru(gru) => &gru.objective,
            Neural::Xlnet(xlnet) => &xlnet.objective,
        }
    }

    pub fn head(self) -> &'a HeadConfig {
        match self {
            Neural::Gru(gru) => &gru.head,
            Neural::Xlnet(xlnet) => &xlnet.head,
        }
    }

    /// Width of the body's states.
    pub fn width(self) -> i64 {
        match self {
            Neural::Gru(gru) => gru.hidden_width,
            Neural::Xlnet(xlnet) => xlnet.width,
        }
    }

    fn dropout(self) -> f64 {
        match self {
            Neural::Gru(gru) => gru.dropout,
            Neural::Xlnet(xlnet) => xlnet.dropout,
        }
    }

    fn check(self) -> Result<(), String> {
        match self {
            Neural::Gru(gru) => gru.check()?,
            Neural::Xlnet(xlnet) => xlnet.check()?,
        }
        if !(0.0..1.0).contains(&self.dropout()) {
            return Err(format!("`dropout` {:?} is not within 0 <= p < 1", self.dropout()));
        }
        check_finite("head.temperature", self.head().temperature, f32::MIN_POSITIVE)?;
        self.head().evidence.as_ref().map_or(Ok(()), EvidenceConfig::check)?;
        self.input().check()?;
        let composes = [
            ("input.content", self.input().content.is_some()),
            ("head.cosine", self.head().cosine),
        ];
        if let Some((key, _)) = composes.iter().find(|(_, is_set)| *is_set && !self.head().tied) {
            return Err(format!("`{key}` needs `head.tied`"));
        }
        self.objective().check()
    }
}

/// `[model]` with `kind = "gru"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct GruConfig {
    /// Width of the recurrent state.
    pub hidden_width: i64,
    /// Number of layers.
    pub n_layers: i64,
    /// Dropout before and after the recurrence; 0 <= p < 1.
    pub dropout: f64,
    /// Input block.
    pub input: InputConfig,
    /// Training objective.
    pub objective: Objective,
    /// Scoring of the catalogue.
    pub head: HeadConfig,
}

impl Default for GruConfig {
    fn default() -> Self {
        Self {
            hidden_width: 128,
            n_layers: 1,
            dropout: 0.0,
            input: InputConfig::default(),
            objective: Objective::causal(),
            head: HeadConfig::default(),
        }
    }
}

impl GruConfig {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_width("hidden_width", self.hidden_width, MOST_WIDTH)?;
        check_width("n_layers", self.n_layers, MAX_LAYERS)
    }
}

/// `[model]` with `kind = "xlnet"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct XlnetConfig {
    /// Width of the states; even, and a multiple of `n_heads`.
    pub width: i64,
    /// Number of attention heads.
    pub n_heads: i64,
    /// Number of layers.
    pub n_layers: i64,
    /// Dropout, everywhere the original has it except on the table of positions; 0 <= p < 1.
    pub dropout: f64,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Epsilon of the layer norms.
    pub layer_norm_epsilon: f64,
    /// Whether sessions are padded to `data.max_length` and the padding is attended to, as
    /// Transformers4Rec does: for comparisons only.
    pub attend_to_padding: bool,
    /// Input block.
    pub input: InputConfig,
    /// Training objective.
    pub objective: Objective,
    /// Scoring of the catalogue.
    pub head: HeadConfig,
}

impl Default for XlnetConfig {
    fn default() -> Self {
        Self {
            width: 192,
            n_heads: 4,
            n_layers: 2,
            dropout: 0.3,
            init_std: 0.01,
            layer_norm_epsilon: 0.03,
            attend_to_padding: false,
            input: InputConfig { projection_width: Some(192), ..InputConfig::default() },
            objective: Objective::Masked { probability: 0.15 },
            head: HeadConfig::default(),
        }
    }
}

/// Largest number of attention weights of a session for which a dropout mask is drawn: a GiB.
const MAX_WEIGHTS: u128 = 1 << 28;

impl XlnetConfig {
    pub(crate) fn check(&self) -> Result<(), String> {
        check_width("width", self.width, MOST_WIDTH)?;
        check_width("n_heads", self.n_heads, MOST_WIDTH)?;
        check_width("n_layers", self.n_layers, MAX_LAYERS)?;
        if self.width % self.n_heads != 0 || self.width % 2 != 0 {
            return Err(format!(
                "`width` {} is not an even number divisible by `n_heads` {}",
                self.width, self.n_heads
            ));
        }
        check_finite("init_std", self.init_std, f32::MIN_POSITIVE)?;
        check_finite("layer_norm_epsilon", self.layer_norm_epsilon, f32::MIN_POSITIVE)
    }

    /// Checks the size of the dropout mask of attention weights, `[H, L, L]` for the longest
    /// session.
    pub(crate) fn check_length(&self, max_length: usize) -> Result<(), String> {
        let n_weights = self.n_heads.max(1) as u128 * (max_length as u128).pow(2);
        if self.dropout == 0.0 || n_weights <= MAX_WEIGHTS {
            return Ok(());
        }
        Err(format!(
            "`dropout` of attention needs a mask of {n_weights} weights for `data.max_length` \
             {max_length} events and `n_heads` {}: at most {MAX_WEIGHTS}",
            self.n_heads
        ))
    }
}

/// `[model.input]`: one vector for each event, from its columns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct InputConfig {
    /// Width of an item's vector, at the input and in the softmax.
    pub item_width: i64,
    /// Width of the vectors of other categorical features.
    pub feature_width: i64,
    /// Standard deviation of the initial vectors.
    pub init_std: f64,
    /// How the features of an event are combined.
    pub aggregation: Aggregation,
    /// How continuous features are represented.
    pub continuous: Continuous,
    /// Whether each feature's vector has a layer norm (Ba et al. 2016).
    pub layer_norm: bool,
    /// Width of a linear layer with a ReLU behind the aggregation; absent: no such layer, but 192
    /// for an XLNet without `[model.input]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub projection_width: Option<i64>,
    /// Dropout on the looked-up vectors of items and other categorical features; 0 <= p < 1.
    pub dropout: f64,
    /// Probability of taking a value from another event of the micro-batch in training: stochastic
    /// swap noise (de Souza Pereira Moreira et al. 2021); 0 <= p < 1.
    pub swap_noise: f64,
    /// What the vectors of items begin as; absent: random, with `init_std`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<StartConfig>,
    /// Vectors of what describes an item are part of its vector, at the input and in the scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<ContentConfig>,
}

impl Default for InputConfig {
    fn default() -> Self {
        Self {
            item_width: 64,
            feature_width: 64,
            init_std: 0.05,
            aggregation: Aggregation::Concat,
            continuous: Continuous::Raw {},
            layer_norm: false,
            projection_width: None,
            dropout: 0.0,
            swap_noise: 0.0,
            start: None,
            content: None,
        }
    }
}

/// `[model.input.start]`: what the vectors of items begin as, scaled to `init_std`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum StartConfig {
    /// Factors of the co-occurrence counts of the first day: a randomised eigendecomposition (Halko
    /// et al. 2011) of pair weights, which the fourth roots of the occurrences of both items
    /// divide.
    PairCounts {},
    /// Vectors from a file; items without one begin at random.
    File {
        /// A parquet file with a row for each item: its index in a column named like the feature of
        /// items, its vector in a list column `vector`. Vectors wider than `item_width` are
        /// projected on their principal axes, narrower ones are padded with zeros.
        path: PathBuf,
        /// Whether the vectors of the file stay as they are.
        #[serde(default)]
        frozen: bool,
    },
}

/// `[model.input.content]`: an item's vector is the sum of one for its id, which begins at zero,
/// and one for each of its attributes. So items that training has not seen are scored by their
/// attributes. These come from the events, and for items without events from `items.parquet` beside
/// `schema.pbtxt`, if there is one: a column with the name of each feature, a row for each item.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ContentConfig {
    /// Features that describe an item, among those in `data.features`. Absent: those that
    /// `schema.pbtxt` does not tag `time`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attributes: Option<Vec<String>>,
    /// Equally full intervals of a continuous attribute, with a vector each; at least 1.
    pub n_buckets: i64,
    /// Probability that a step of training reads and scores an item by its attributes alone; 0 <= p
    /// < 1.
    pub id_dropout: f64,
}

impl Default for ContentConfig {
    fn default() -> Self {
        Self { attributes: None, n_buckets: 16, id_dropout: 0.1 }
    }
}

/// `model.input.aggregation`: how the features of an event are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Concatenated, sorted by feature name.
    Concat,
    /// Added; all features must have the item's width.
    Sum,
}

/// `model.input.continuous`: how continuous features are represented.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Continuous {
    /// One number for each feature.
    Raw {},
    /// All features together one vector, from a linear layer with a ReLU.
    Projected {
        /// Width of that vector.
        width: i64,
    },
    /// Soft one-hot encoding (de Souza Pereira Moreira et al. 2021): each feature a vector, mixed
    /// from learnt ones by a softmax over linear functions of the value.
    SoftOneHot {
        /// Number of learnt vectors.
        n_vectors: i64,
        /// Width of the learnt vectors.
        width: i64,
    },
}

impl InputConfig {
    pub(crate) fn check(&self) -> Result<(), String> {
        let (n_vectors, width) = match self.continuous {
            Continuous::Raw {} => (1, 1),
            Continuous::Projected { width } => (1, width),
            Continuous::SoftOneHot { n_vectors, width } => (n_vectors, width),
        };
        let widths = [
            ("input.item_width", self.item_width),
            ("input.feature_width", self.feature_width),
            ("input.projection_width", self.projection_width.unwrap_or(1)),
            ("input.continuous.n_vectors", n_vectors),
            ("input.continuous.width", width),
        ];
        for (key, value) in widths {
            check_width(key, value, MOST_WIDTH)?;
        }
        check_finite("input.init_std", self.init_std, 0.0)?;
        if let Some(content) = &self.content {
            check_width("input.content.n_buckets", content.n_buckets, MOST_WIDTH)?;
        }
        let id_dropout = self.content.as_ref().map_or(0.0, |content| content.id_dropout);
        let probabilities = [
            ("input.dropout", self.dropout),
            ("input.swap_noise", self.swap_noise),
            ("input.content.id_dropout", id_dropout),
        ];
        match probabilities.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
            Some((key, p)) => Err(format!("`{key}` {p:?} is not within 0 <= p < 1")),
            None => Ok(()),
        }
    }
}

/// `[model.objective]`: which events are hidden, and which are predicted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Every event is predicted from the events before it.
    Causal {
        /// Probability that an event is left out of a session in an epoch (Tan et al. 2016).
        #[serde(default)]
        drop: f64,
        /// Probability that a session is reversed in an epoch.
        #[serde(default)]
        reverse: f64,
    },
    /// Masked item modelling: hidden events are replaced by a learnt vector and predicted from all
    /// others (Devlin et al. 2019, Sun et al. 2019).
    Masked {
        /// Probability that an event is hidden.
        #[serde(default = "mask_probability")]
        probability: f64,
    },
    /// Permutation: spans of events are predicted in a random order, each event from those outside
    /// the spans and those earlier in that order (Yang et al. 2019). A GRU reads the events in that
    /// order.
    Permutation {
        /// Approximate share of the events that are predicted.
        #[serde(default = "permutation_probability")]
        probability: f64,
        /// Longest span, in events.
        #[serde(default = "max_span")]
        max_span: usize,
    },
    /// Replaced-item detection on top of masked item modelling: hidden events are filled with the
    /// model's own predictions, and each event is classified as original or replaced (Clark et al.
    /// 2020, with one network as generator and discriminator).
    Replaced {
        /// Probability that an event is hidden.
        #[serde(default = "mask_probability")]
        probability: f64,
        /// Weight of an event's detection loss relative to a hidden event's prediction loss.
        #[serde(default = "detection_weight")]
        weight: f64,
    },
}

fn mask_probability() -> f64 {
    0.15
}

fn permutation_probability() -> f64 {
    1.0 / 6.0
}

fn max_span() -> usize {
    5
}

fn detection_weight() -> f64 {
    1.0
}

impl Objective {
    /// Causal, without data augmentation.
    pub fn causal() -> Self {
        Objective::Causal { drop: 0.0, reverse: 0.0 }
    }

    /// Checks the ranges of the values.
    ///
    /// # Errors
    /// Returns the first invalid key.
    pub fn check(&self) -> Result<(), String> {
        let probability = match *self {
            Objective::Causal { drop, reverse } => {
                let shares = [("drop", drop), ("reverse", reverse)];
                return match shares.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
                    Some((key, p)) => {
                        Err(format!("`objective.{key}` {p:?} is not within 0 <= p < 1"))
                    }
                    None => Ok(()),
                };
            }
            Objective::Permutation { max_span: max_span @ (0 | 65_537..), .. } => {
                return Err(format!("`objective.max_span` must be 1 to 65536, not {max_span}"));
            }
            Objective::Replaced { weight, .. } if check_finite("", weight, 0.0).is_err() => {
                return Err(format!("`objective.weight` cannot be {weight:?}"));
            }
            Objective::Masked { probability }
            | Objective::Permutation { probability, .. }
            | Objective::Replaced { probability, .. } => probability,
        };
        if (f64::MIN_POSITIVE..1e-6).contains(&probability) {
            return Err(format!("`objective.probability` {probability:?} is less than 0.000001"));
        }
        if !(probability > 0.0 && probability < 1.0) {
            return Err(format!("`objective.probability` {probability:?} is not within 0 < p < 1"));
        }
        Ok(())
    }

    /// Abbreviation in the literature.
    pub fn short_name(&self) -> &'static str {
        match self {
            Objective::Causal { .. } => "CLM",
            Objective::Masked { .. } => "MLM",
            Objective::Permutation { .. } => "PLM",
            Objective::Replaced { .. } => "RTD",
        }
    }

    /// Whether some positions have the mask vector as input. `attends`: whether the body is an
    /// attention model, which is independent of the order of positions, or a recurrence.
    pub fn masks(&self, attends: bool) -> bool {
        match self {
            Objective::Causal { .. } => false,
            Objective::Permutation { .. } => attends,
            Objective::Masked { .. } | Objective::Replaced { .. } => true,
        }
    }

    /// Whether attention needs a second stream of states, which do not depend on their own event
    /// while the states of the first stream do.
    pub fn two_streams(&self) -> bool {
        matches!(self, Objective::Permutation { .. })
    }
}

/// `[model.head]`: scores of the catalogue from the states of the body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct HeadConfig {
    /// Whether a ReLU is applied to states before they are scored, as in Transformers4Rec.
    pub relu: bool,
    /// Whether items are scored with their input vectors, or with a separate table.
    pub tied: bool,
    /// Whether scores are cosines of states and item vectors, `cos(h, e) / temperature + b`, with a
    /// temperature that is learnt. Vectors of events are normalised, too (Gupta et al. 2019).
    pub cosine: bool,
    /// Divisor of the scores: `h · e / temperature + b`; above 0. With `cosine` its initial value,
    /// for which 0.06 is usual.
    pub temperature: f64,
    /// Scores of candidates from co-occurrence counts; absent: from their vectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evidence: Option<EvidenceConfig>,
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self { relu: true, tied: true, cosine: false, temperature: 1.0, evidence: None }
    }
}

/// `[model.head.evidence]`: the candidates of a session are scored from co-occurrence counts, by a
/// network of two hidden layers that reads the counts and the state of the body. All other items
/// are scored by their vectors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct EvidenceConfig {
    /// Width of the hidden layers.
    pub hidden_width: i64,
    /// Which items are candidates.
    pub candidates: CandidatesConfig,
}

impl Default for EvidenceConfig {
    fn default() -> Self {
        Self { hidden_width: 32, candidates: CandidatesConfig::default() }
    }
}

impl EvidenceConfig {
    fn check(&self) -> Result<(), String> {
        check_width("head.evidence.hidden_width", self.hidden_width, MOST_WIDTH)?;
        self.candidates.check("head.evidence.candidates")
    }
}

/// Candidates of a session: items that follow or precede its last items in other sessions, its own
/// items, frequent items with the attributes of its last item, and the most frequent items of all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CandidatesConfig {
    /// Candidates of a session; at least 1.
    pub n_candidates: i64,
    /// Last items of a session whose neighbours are candidates; at least 1.
    pub n_recent: i64,
    /// Neighbours of an item: that many successors and that many predecessors. With 0, pairs are
    /// not counted.
    pub n_neighbours: i64,
    /// Most frequent items of all, and of those that share an attribute with the last item, that
    /// are candidates. With 0 and no neighbours, the candidates are the items of the session.
    pub n_frequent: i64,
    /// Features that describe an item, among those in `data.features`. Absent: those that
    /// `schema.pbtxt` does not tag `time`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attributes: Option<Vec<String>>,
}

impl Default for CandidatesConfig {
    fn default() -> Self {
        Self { n_candidates: 224, n_recent: 4, n_neighbours: 64, n_frequent: 32, attributes: None }
    }
}

impl CandidatesConfig {
    /// Largest number of rows that are looked up for a session.
    const MOST: i64 = 1 << 16;

    fn check(&self, section: &str) -> Result<(), String> {
        let numbers = [("n_candidates", self.n_candidates), ("n_recent", self.n_recent)];
        let may_be_zero = [("n_neighbours", self.n_neighbours), ("n_frequent", self.n_frequent)];
        for (key, n) in numbers.into_iter().chain(may_be_zero.into_iter().filter(|(_, n)| *n != 0))
        {
            check_width(&format!("{section}.{key}"), n, Self::MOST)?;
        }
        let n_pairs = self.n_recent * self.n_neighbours;
        if n_pairs > Self::MOST {
            return Err(format!(
                "`{section}.n_recent` {} times `n_neighbours` {} is {n_pairs}: at most {}",
                self.n_recent,
                self.n_neighbours,
                Self::MOST
            ));
        }
        Ok(())
    }
}

/// `[model]` with `kind = "loglinear"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct LogLinearConfig {
    /// Sessions of the last day that the weights are fitted on; at least 1.
    pub n_fitted: usize,
    /// Weight of the squared weights in the fit; 0 or more.
    pub l2: f64,
    /// Items that are ranked by counts; all others follow by popularity.
    pub candidates: CandidatesConfig,
}

impl Default for LogLinearConfig {
    fn default() -> Self {
        Self { n_fitted: 20_000, l2: 1e-4, candidates: CandidatesConfig::default() }
    }
}

impl LogLinearConfig {
    fn check(&self) -> Result<(), String> {
        check_count("n_fitted", self.n_fitted, 1 << 24)?;
        check_finite("l2", self.l2, 0.0)?;
        self.candidates.check("candidates")
    }
}

/// `model.weighting` and `model.score_weighting`: how a weight falls with the distance from the
/// session's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// No decay.
    Same,
    /// A tenth for each item, to 0: `w = 1 − (n − p) / 10`, `v = 1 − d / 10`.
    Linear,
    /// `w = p / n`, `v = 1 / d`.
    Div,
    /// The square of `div`.
    Quadratic,
    /// `w = 1 / log₁₀(n − p + 1.7)`, `v = 1 / log₁₀(d + 1.7)`.
    Log,
}

impl Decay {
    /// `w(p, n)`: weight of position `p` (from 1) of `n`.
    pub fn of_position(self, p: usize, n: usize) -> f64 {
        let distance = (n - p) as f64;
        match self {
            Decay::Same => 1.0,
            Decay::Linear => (1.0 - distance / 10.0).max(0.0),
            Decay::Div => p as f64 / n as f64,
            Decay::Quadratic => (p as f64 / n as f64).powi(2),
            Decay::Log => 1.0 / (distance + 1.7).log10(),
        }
    }

    /// `v(d)`: weight of a neighbour whose last shared item is number `d` (from 1) from the end.
    pub fn of_distance(self, d: usize) -> f64 {
        let d = d as f64;
        match self {
            Decay::Same => 1.0,
            Decay::Linear => (1.0 - d / 10.0).max(0.0),
            Decay::Div => 1.0 / d,
            Decay::Quadratic => 1.0 / (d * d),
            Decay::Log => 1.0 / (d + 1.7).log10(),
        }
    }
}

/// Parameters of V-SkNN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct NeighboursConfig {
    /// Number of neighbours; at least 1.
    pub k: usize,
    /// Most recent sessions with a shared item, among which neighbours are chosen; at least `k`.
    pub sample_size: usize,
    /// Decay `w` of an item's weight in the similarity.
    pub weighting: Decay,
    /// Decay `v` of a neighbour's weight with the place of the last shared item.
    pub score_weighting: Decay,
    /// Weight of the inverse document frequency, which prefers rare items; 0 disables it.
    pub idf_weight: f64,
}

impl Default for NeighboursConfig {
    fn default() -> Self {
        Self {
            k: 500,
            sample_size: 2500,
            weighting: Decay::Linear,
            score_weighting: Decay::Div,
            idf_weight: 5.0,
        }
    }
}

impl NeighboursConfig {
    pub(crate) fn check(&self) -> Result<(), String> {
        let Self { k, sample_size, idf_weight, .. } = *self;
        if k == 0 {
            return Err("`k` must be at least 1".to_owned());
        }
        if sample_size < k {
            return Err(format!("`sample_size` {sample_size} is less than `k` {k}"));
        }
        if !(idf_weight.is_finite() && idf_weight >= 0.0) {
            return Err(format!("`idf_weight` cannot be {idf_weight:?}"));
        }
        Ok(())
    }
}
