import Foundation

/// `SWIMG_SEED` and `SWIMG_CASES` in the environment set the first seed and the number of cases of
/// random tests.
public enum RandomCases {
    public static let seed = number("SWIMG_SEED") ?? 20_240_607
    public static let all = Array(0..<(number("SWIMG_CASES") ?? 16))

    private static func number(_ name: String) -> Int? {
        ProcessInfo.processInfo.environment[name].flatMap { Int($0) }
    }
}

/// Makes one image or a chain of images and logs the commands.
public struct RandomImage {
    public var log: [String] = []
    public private(set) var top = ""
    public private(set) var format = "raw"
    private let seed: UInt64
    private let folder: TempFolder
    private var random: SplitMix64
    public private(set) var size = 0

    public init(seed: UInt64, folder: TempFolder) {
        self.seed = seed
        self.folder = folder
        random = SplitMix64(seed: seed)
    }

    public var story: String {
        "SWIMG_SEED=\(seed) SWIMG_CASES=1 makes this case:\n" + log.joined(separator: "\n")
    }

    /// - Parameter depths: the possible numbers of images in the chain.
    public mutating func build(depths: [Int] = [1, 1, 1, 2, 2, 3]) throws {
        let depth = random.pick(depths)
        for layer in 0..<depth {
            // Layers differ in size: they are longer or shorter than the layer below.
            size = (1 + random.below(2048)) * 512
            let name = "layer\(layer)"
            if layer == 0 && random.once(in: 3) {
                try run("qemu-img", "create", "-q", "-f", "raw", name, "\(size)")
                top = name
                format = "raw"
                try scribble(compressed: false, cluster: 4096)
                continue
            }
            let cluster = 512 << random.below(9)
            var options = "cluster_size=\(cluster)"
            let version2 = random.once(in: 4)
            let extended = !version2 && cluster >= 16384 && random.once(in: 2)
            let zstd = !version2 && random.once(in: 3)
            options += version2 ? ",compat=0.10" : ""
            options += extended ? ",extended_l2=on" : ""
            options += zstd ? ",compression_type=zstd" : ""
            // A 1-bit refcount cannot count the streams that share a cluster.
            options += version2 ? "" : ",refcount_bits=\(random.pick([8, 16, 16, 32, 64]))"
            let below = layer == 0 ? [] : ["-b", top, "-F", format]
            try run(
                "qemu-img",
                ["create", "-q", "-f", "qcow2"] + below + ["-o", options, name, "\(size)"])
            top = name
            format = "qcow2"
            try scribble(compressed: true, cluster: cluster)
            if random.once(in: 3) {
                try run("qemu-img", "snapshot", "-c", "s", name)
                try scribble(compressed: true, cluster: cluster)
            }
        }
    }

    /// Writes of every kind at random places.
    private mutating func scribble(compressed: Bool, cluster: Int) throws {
        var commands: [String] = []
        var used = Set<Int>()
        for _ in 0..<1 + random.below(14) {
            var at = random.below(size / 512) * 512
            var length = min((1 + random.below(random.pick([2, 8, 32, 256]))) * 512, size - at)
            switch random.below(10) {
            case 0, 1, 2, 3:
                commands.append("write -P \(1 + random.below(255)) \(at) \(length)")
            case 4: commands.append("write -P 0 \(at) \(length)")
            case 5: commands.append("write -z \(at) \(length)")
            case 6: commands.append("write -z -u \(at) \(length)")
            case 7: commands.append("discard \(at) \(length)")
            default:
                guard compressed else { continue }
                at = at / cluster * cluster
                length = min(cluster, size - at)
                // qemu 7.2 refuses a compressed write over an allocated cluster.
                guard at + length <= size, length == cluster, used.insert(at).inserted else {
                    continue
                }
                commands.insert("write -c -P \(1 + random.below(255)) \(at) \(length)", at: 0)
            }
        }
        guard !commands.isEmpty else { return }
        let words = ["-f", format] + commands.flatMap { ["-c", $0] } + [top]
        log.append((["qemu-io"] + words).map(shellQuoted).joined(separator: " "))
        // A refused compressed write (after a snapshot, say) only makes the image less interesting.
        _ = try TestSupport.run("qemu-io", words, in: folder.path)
    }

    /// One random command line.
    public mutating func conversion() -> String {
        var line = ["-m \(random.pick([1, 2, 3, 8, 16]))"]
        if random.once(in: 2) { line.append("-W") }
        // Little memory makes several chunks of a small disk.
        if random.once(in: 2) { line.append("--memory 1M") }
        if random.once(in: 3) { line.append("-S \(random.pick(["0", "512", "4k", "32k", "1M"]))") }
        if !random.once(in: 4) || format == "raw" { line.append("-f \(format)") }
        if random.once(in: 3) {
            line.append("-O raw")
        } else {
            let zstd = random.once(in: 3)
            line.append("-O qcow2 -o cluster_size=\(512 << random.below(9))")
            if zstd { line.append("-o compression_type=zstd") }
            if !zstd && random.once(in: 4) { line.append("-o compat=0.10") }
            if random.once(in: 2) { line.append("-c") }
        }
        if random.once(in: 4) {
            line.append("-t \(random.pick(["none", "writethrough", "directsync"]))")
        }
        if random.once(in: 4) { line.append("-T \(random.pick(["none", "directsync"]))") }
        return (line + [top, "target"]).joined(separator: " ")
    }

    private mutating func run(_ program: String, _ arguments: String...) throws {
        try run(program, arguments)
    }

    private mutating func run(_ program: String, _ arguments: [String]) throws {
        log.append(([program] + arguments).map(shellQuoted).joined(separator: " "))
        try require(program, arguments, in: folder.path)
    }
}
