import Benchmark
import DiskImage
import Foundation
import ImageConvert
import ImageDrivers
import ImageFormats
import ImageStorage

// Times single steps of a conversion.

/// `blackHole` keeps results that nothing uses from being optimised away.
let benchmarks: @Sendable () -> Void = {
    Benchmark.defaultConfiguration = .init(
        metrics: [.wallClock, .cpuTotal, .throughput], maxDuration: .seconds(3))

    Benchmark("zero scan, 1 MiB of zeros") { benchmark in
        let zeros = [UInt8](repeating: 0, count: 1 << 20)
        benchmark.startMeasurement()
        for _ in benchmark.scaledIterations {
            let bytes = zeros.span.bytes
            blackHole(ZeroScan.isZero(bytes))
        }
    }

    Benchmark("zero scan in runs of 4 KiB, 1 MiB of data") { benchmark in
        let data = SampleImage.text(count: 1 << 20)
        benchmark.startMeasurement()
        for _ in benchmark.scaledIterations {
            var count = 0
            for start in stride(from: 0, to: data.count, by: 4096) {
                let bytes = data.span.bytes
                count += ZeroScan.isZero(bytes, start..<start + 4096) ? 1 : 0
            }
            blackHole(count)
        }
    }

    // Each sample makes an image first, so it should run many iterations.
    let many = Benchmark.Configuration(
        metrics: [.wallClock, .cpuTotal, .throughput], scalingFactor: .kilo,
        maxDuration: .seconds(5))

    for type in ["zlib", "zstd"] {
        Benchmark("inflate one cluster of 64 KiB, \(type)", configuration: many) { benchmark in
            let image = try await SampleImage.make(compression: type)
            defer { image.remove() }
            let opened = try await ImageOpener().open(ImageName(image.path), format: .qcow2)
            var buffer = try IOBuffer(byteCount: SampleImage.cluster)
            var cluster: Int64 = 0
            benchmark.startMeasurement()
            for _ in benchmark.scaledIterations {
                var bytes = buffer.mutableBytes
                try await opened.source.read(
                    into: &bytes, at: cluster * 2 * Int64(SampleImage.cluster))
                cluster = (cluster + 1) % SampleImage.dataClusters
            }
            benchmark.stopMeasurement()
        }
    }

    Benchmark("walk over the tables of 1024 runs", configuration: many) { benchmark in
        let image = try await SampleImage.make(compression: nil)
        defer { image.remove() }
        let source = try await ImageOpener().open(ImageName(image.path), format: .qcow2).source
        benchmark.startMeasurement()
        for _ in benchmark.scaledIterations {
            var offset: Int64 = 0
            while offset < source.virtualSize {
                let found = try await source.mappings(
                    at: offset, limit: source.virtualSize, holes: .thorough)
                offset = found[found.count - 1].range.upperBound
            }
        }
        benchmark.stopMeasurement()
    }

    for workers in [1, 8] {
        Benchmark("1000 chunks through the pipeline, -m \(workers)") { benchmark in
            let pipeline = Pipeline(workers: workers, writesInOrder: true)
            let source = EmptyHanded(chunks: 1000)
            for _ in benchmark.scaledIterations {
                try await pipeline.copy(from: source, extents: source, to: Swallow())
            }
        }
    }
}

/// A disk with data in every other cluster.
struct SampleImage {
    static let cluster = 65536
    static let dataClusters: Int64 = 512

    let path: String
    private let folder: URL

    /// Lines as programs print them: compresses to about a third.
    static func text(count: Int) -> [UInt8] {
        var bytes: [UInt8] = []
        var number: UInt64 = 1
        while bytes.count < count {
            number = number &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            bytes += "item \(number >> 40): \(number >> 52) of \(number % 1000)\n".utf8
        }
        return Array(bytes.prefix(count))
    }

    /// - Parameter compression: of the data; nil leaves it plain.
    static func make(compression: String?) async throws -> SampleImage {
        let folder = URL.temporaryDirectory.appending(path: "swimg-bench-\(UUID())")
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        let raw = folder.appending(path: "raw")
        _ = FileManager.default.createFile(atPath: raw.path(), contents: nil)
        let file = try FileHandle(forWritingTo: raw)
        for index in 0..<dataClusters {
            try file.seek(toOffset: UInt64(index * 2 * Int64(cluster)))
            try file.write(contentsOf: text(count: cluster))
        }
        try file.truncate(atOffset: UInt64(dataClusters * 2 * Int64(cluster)))
        try file.close()
        let image = folder.appending(path: "image").path()
        var conversion = Conversion(sources: [ImageName(raw.path())], target: ImageName(image))
        conversion.sourceFormat = .raw
        conversion.targetFormat = .qcow2
        if let compression {
            conversion.compress = true
            try conversion.options.add(Array("compression_type=\(compression)".utf8))
        }
        try await conversion.run()
        return SampleImage(path: image, folder: folder)
    }

    func remove() { try? FileManager.default.removeItem(at: folder) }
}

/// A source of data that takes no time to read.
struct EmptyHanded: ImageSource, ImageLayer {
    let chunks: Int64
    var virtualSize: Int64 { chunks * Pipeline.defaultChunk }
    var readGranularity: Int64 { 1 }

    var layers: [any ImageLayer] { [self] }
    var holder: (any BlockHolder)? { nil }

    func isSparse() async throws -> Bool { false }

    func mappings(
        at offset: Int64, limit: Int64, holes: HoleSearch
    ) async throws -> [Mapping] {
        [Mapping(offset..<limit, .data)]
    }

    func read(_ mappings: ArraySlice<Mapping>, into buffer: inout MutableRawSpan) async throws {}
}

/// A target that takes no time to write.
struct Swallow: ImageTarget {
    var traits: TargetTraits {
        TargetTraits(granularity: 4096, readsAsZeroFrom: 0, placesInOrder: true)
    }
    var compresses: Bool { false }

    func encode(
        _ data: RawSpan, positions: Range<Int>, at guestOffset: Int64,
        into encoded: inout MutableRawSpan, used: inout Int
    ) throws -> [EncodedPiece] { [] }

    func place(_ pieces: [EncodedPiece], encoded: RawSpan) throws -> Placement { Placement() }

    func write(_ placement: Placement, data: RawSpan, origin: BufferOrigin) async throws {}

    func finish(virtualSize: Int64) async throws {}
}
